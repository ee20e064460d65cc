//go:build !race

package blobmgr

const defaultHistories = 2000
