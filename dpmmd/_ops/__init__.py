"""The operations as autograd and torch.library see them, one file each, on any of `dpmmd._cores`.

There are two ways to call an opaque core. As custom operators its operations are opaque to
torch.compile, torch.export and whatever else traces; but a call of such an operator with twenty
taps takes a millisecond of Python. Where nothing traces they are called as they are.
"""
