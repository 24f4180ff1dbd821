"""The core knows no part: errors, specs, sites, taps, masks, the cache, numerics. Import what you need from its files."""
