"""Looking inside: entropy and budget per layer, kept tokens over the images, attention maps, answers by ratio."""

from meda_kv.inspection.collect import Inspection, collect, entropies
from meda_kv.inspection.grids import ImageTokens, View, locate_images
from meda_kv.inspection.writing import write_inspection

__all__ = ["ImageTokens", "Inspection", "View", "collect", "entropies", "locate_images", "write_inspection"]
