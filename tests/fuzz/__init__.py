"""Cases made from small valid files by changing their structure."""
