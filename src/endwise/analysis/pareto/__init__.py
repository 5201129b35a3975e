"""How much of the model does each method keep, at what number of active features?"""
