"""What the gate knows of earlier runs, as JSON."""
