"""Networks of other ecosystems behind one interface; each file is found by its entry point, none imports another."""
