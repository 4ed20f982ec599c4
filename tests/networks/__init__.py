"""Networks as people write them, small, for the exporters: name -> Network.  Weights are random, nothing is loaded."""

from __future__ import annotations

from tests.networks import hand, images, sequences, text
from tests.networks.common import Network

NETWORKS: dict[str, Network] = {**text.NETWORKS, **images.NETWORKS, **sequences.NETWORKS, **hand.NETWORKS}
