// Package rounds has the test of many containers of many images: snapshotter and daemon do not
// grow with them.
package rounds
