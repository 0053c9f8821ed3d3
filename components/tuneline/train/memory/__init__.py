"""How much memory a run takes, how much is free, and which settings make the run fit."""
