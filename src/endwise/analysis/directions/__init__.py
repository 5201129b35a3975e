"""Which directions of the activation does a dictionary keep, and which does the model use?"""
