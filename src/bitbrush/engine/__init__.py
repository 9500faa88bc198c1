"""Running a recipe: recipes, plans, the journaled loop, the calibration tape, the only writer."""
