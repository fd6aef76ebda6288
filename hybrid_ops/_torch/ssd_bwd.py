def ssd_chunk_scan_bwd(*a):
    raise NotImplementedError
