"""Shape annotations are enforced while tests run: every function of the package checks what it is given."""

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import _import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a number too


def install() -> None:
    """Call before anything of the package is imported."""

    class FunctionsOnly(_import_hook.JaxtypingTransformer):
        """Leaves classes alone: JAX builds its pytrees of anything, also of shapes and of None."""

        def visit_ClassDef(self, node):
            self._parents.append(node)
            self.generic_visit(node)
            self._parents.pop()
            return node

    _import_hook.JaxtypingTransformer = FunctionsOnly
    jaxtyping.install_import_hook("twister_jax", "tests.shape_checks.checked")
