"""Decide: recognised facts in, a rewrite and a reason out."""
