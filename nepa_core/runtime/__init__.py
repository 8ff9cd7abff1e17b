"""How the method is run: configs, optimiser, data order, checkpoints, the fit loop. The method never imports it."""
