"""Training of quantizers with Lightning: the modules, losses and optimizers, and fits that resume and recover."""
