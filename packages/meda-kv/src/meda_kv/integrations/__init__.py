"""Adapters to other people's programs; none of them is a dependency, each is imported when it is used.

`meda_kv.integrations.lmms_eval` offers the model ``meda_kv`` to lmms-eval, `meda_kv.integrations.kvpress` a press.
"""
