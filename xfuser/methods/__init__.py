"""The parallel methods. Each method works on any model that has a plan."""
