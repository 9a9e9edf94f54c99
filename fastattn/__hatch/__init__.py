"""What Hatch has to know to build a wheel for a platform, with compiled kernels in it; no wheel has this folder."""
