"""One small experiment per method: does the paper's claim hold here?"""
