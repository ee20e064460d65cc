// Package docs tests that README and docs speak of what there is: commands and options of the
// programs, keys of their configuration, files, and headings that links go to.
package docs
