"""The pure core: which ticket runs on which worker, which worker starts or ends, who holds which device."""
