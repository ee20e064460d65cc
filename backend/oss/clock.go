package oss

import (
	"context"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/aliyun/alibabacloud-oss-go-sdk-v2/oss/signer"
)

// A clock signs requests with the server's time once that is known to differ from ours.
type clock struct {
	signer signer.Signer
	ahead  atomic.Int64 // nanoseconds by which the server's clock is ahead of ours
}

func newClock(region string) *clock {
	if region == "" {
		return &clock{signer: &signer.SignerV1{}}
	}
	return &clock{signer: &signer.SignerV4{}}
}

// Sign signs a request.
func (c *clock) Sign(ctx context.Context, sc *signer.SigningContext) error {
	sc.ClockOffset = time.Duration(c.ahead.Load())
	return c.signer.Sign(ctx, sc)
}

// set takes the time that the server gave just now in the header field of that name.
func (c *clock) set(date string) (ahead time.Duration, ok bool) {
	at, err := http.ParseTime(date)
	if err != nil {
		return 0, false
	}
	ahead = time.Until(at)
	c.ahead.Store(int64(ahead))
	return ahead, true
}
