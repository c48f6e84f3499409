"""Generation: prompts with audio in; tokens, log-probabilities, why each ended, and the weights' version out.

    request.py      what is asked (prompt, sampling, reasoning budget) and what comes of it
    interface.py    what an engine offers
    engine.py       the loop: admit, prefill, decode, hand out
    scheduler.py    who runs: admission by free pages, chunks of prompts, prompts shared by their samples, preemption
    sequence.py     one sample on its way: what it reads next, and when it ends
    pages.py        the cache's pages, counted
    cache.py        keys and values in those pages
    rows.py         what one decoding step reads of every row, in buffers that stay where they are
    forward.py      embeddings, layers, logits of one pass
    layers.py       the decoder's layers without what training carries along
    sampling.py     logits to tokens and log-probabilities
    decode.py       one decoding step, a CUDA graph per batch size on a GPU
    data_parallel.py    prompts shared out over data-parallel ranks
    backend.py      which engine makes the rollouts of a run
    vllm_backend.py     vLLM behind the same interface
    parity.py       whether another engine says of its samples what the trainer says

`evaluation` and reinforcement learning use it; it uses `model`.
"""
