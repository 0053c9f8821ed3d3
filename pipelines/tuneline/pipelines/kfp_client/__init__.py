"""What the KFP API is asked for: runs and schedules."""
