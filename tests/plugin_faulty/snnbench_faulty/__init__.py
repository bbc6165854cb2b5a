"""A guest of snnbench that does everything wrong; found through the dist-info folder beside it."""
