"""Commands and recipes: the only place where the engine, the labelers and the model meet."""
