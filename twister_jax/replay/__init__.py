"""The replay: stored steps on the devices (`store`) and on disk (`segments`)."""
