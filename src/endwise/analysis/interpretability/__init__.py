"""How well do explanations predict where features fire?"""
