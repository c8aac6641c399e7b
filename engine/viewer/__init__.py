"""The viewer: runs at work and finished, slides and Deep Zoom pictures, shown in a browser on this machine."""
