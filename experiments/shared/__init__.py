"""The parts that the experiments of the paper and of its sequel share.

spreads      the mean and spread of scores over seeds, and differences of them
charts       charts of scores with their spread
page_files   the files of a report
"""
