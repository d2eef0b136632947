"""The entry points of other HSTU libraries: a model written for them runs on hstu_ops after one changed import.

    from hstu_ops.compat.generative_recommenders import hstu_mha, delta_hstu_mha
    from hstu_ops.compat.hstu_attn import hstu_attn_varlen_func

Names, argument order, defaults and semantics are theirs. What cannot be honoured raises ValueError and says why.
"""
