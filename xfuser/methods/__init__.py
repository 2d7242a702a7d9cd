"""The parallel methods, one each; every one works on any model that has a plan."""
