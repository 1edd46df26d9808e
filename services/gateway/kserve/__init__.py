"""The Open Inference Protocol v2 over gRPC: KServe's and Triton's clients on our pipeline.

`servicer` speaks it, `convert` is where its protos stop, `tensors` packs elements,
`options` reads a request as Triton's language-model backends take it, `stream` carries
the many requests of one ModelStreamInfer.
"""
