"""Say what failed, why, and what to change; or, after success, what was done."""
