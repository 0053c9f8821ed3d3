"""How much memory a run takes, and which settings make it fit."""
