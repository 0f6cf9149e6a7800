"""Networks that answer with feature maps."""

import torch

from kdav_fast.models import build_classifier, build_stock


def randomised(network):
    """Blocks that start as the identity, as zero-initialised ones do, would look like any other."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return network


def staged(name, size, preactivations=False, **arguments):
    """A classifier that answers with maps, and the stock network of the same weights."""
    torch.manual_seed(0)
    classifier = randomised(build_classifier(name, 10, image_size=size, **arguments)).eval()
    stock = build_stock(name, 10, arguments=classifier.facts.arguments).eval()
    stock.load_state_dict(classifier.stock_state_dict())
    classifier.take_stages(preactivations)
    return classifier, stock, torch.randn(2, 3, size, size)


def assert_maps(given, wanted):
    assert len(given) == len(wanted)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other)


def small(preactivations=True):
    torch.manual_seed(0)
    classifier = randomised(build_classifier("torchvision:resnet18", 5, image_size=32))
    classifier.take_stages(preactivations)
    return classifier
