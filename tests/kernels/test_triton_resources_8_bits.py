"""The launches with clusters of 8 bits compile for every GPU we name, at the resources on record."""

from tests.kernels.triton_resource_gates import ResourceGates


class TestBasesOf8Bits(ResourceGates):
    base_bits = 8
