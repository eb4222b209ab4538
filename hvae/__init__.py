"""The parts of the HVAE: config language, distributions, files, processes, text."""
