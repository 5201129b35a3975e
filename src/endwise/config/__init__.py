"""Recipes: their fields, their rules, the ones that ship."""
