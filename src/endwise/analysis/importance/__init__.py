"""Which features does the model use, and how many carry most of the effect?"""
