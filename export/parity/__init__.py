"""Parity: does the package compute what the torch model computes?"""
