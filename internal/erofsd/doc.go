// Package erofsd is the program of that name: what its command line, its configuration file
// and its environment say, and which of its processes this one is ([Main]). It knows nothing
// of images; that is internal/daemon, which it runs.
package erofsd
