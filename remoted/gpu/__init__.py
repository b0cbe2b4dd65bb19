"""GPUs of this host: devices as facts (``nvml``), who may open them, moving workers off them."""
