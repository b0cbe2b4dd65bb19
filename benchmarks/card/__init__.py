"""What only a card can show: how fast a process on it is parked and restored, and what the driver does in the odd cases."""
