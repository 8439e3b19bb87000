"""Networks as (init, apply) pairs; the only folder that imports flax.linen."""
