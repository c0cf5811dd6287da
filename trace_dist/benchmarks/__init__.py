"""Measuring training steps beside what a user would run instead."""
