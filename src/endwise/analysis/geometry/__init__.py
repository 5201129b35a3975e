"""Do methods and seeds find the same features?"""
