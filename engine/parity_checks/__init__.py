"""Replays that compare this machine's arithmetic with stored reference tensors."""
