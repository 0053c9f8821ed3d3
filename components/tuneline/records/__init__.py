"""The records of merged models, exports, scores and decisions, which `artifacts.py` exports."""
