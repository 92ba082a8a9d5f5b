"""Looking at what was learned: load it, watch it play, dream, report, export."""
