"""What the methods stand on: devices, process groups, attention."""
