"""What a run needs, held against what there is, before anything is started."""
