"""A fixed text in plain English, on which perplexity is measured. Written for this purpose."""

PASSAGE = """\
The ferry to the island leaves at seven in the morning, before most of the town is awake. In winter it is dark, \
and the lamps on the quay shine on wet stones. A man in a yellow coat takes the tickets and knows nearly \
everybody by name. There are never many people: two teachers, a nurse, a few workers with their tools, and \
sometimes a visitor who has come to walk along the cliffs. The crossing takes forty minutes when the sea is \
calm. When it is rough the captain goes around the northern point, where the water is deeper, and then it takes \
an hour.

My grandmother was born on that island, in a white house above the harbour. She used to say that you could tell \
the weather by the sound of the bell on the buoy. If it rang slowly, the day would be fine. If it rang fast and \
without a pause, the boats stayed at home. As a child I believed that the bell made the weather, and that \
somebody only had to hold it still for the sun to come out. She never told me that I was wrong. She said that \
people had tried.

There is one shop on the island. It sells bread, milk, rope, newspapers, stamps and boots. The woman who runs it \
keeps a book in which she writes down what each family owes her, and at the end of the month they pay. Nobody \
has ever asked to see the book. Once, a company from the mainland offered to build a larger shop with a car \
park. The islanders held a meeting in the school and talked about it for three hours. In the end they voted \
against it, not because they did not want fresh fruit in February, but because they could not imagine where one \
would stand and talk.

The school has eleven pupils. They sit in one room with a stove in the middle, the youngest near the window and \
the oldest near the door. Their teacher explains something to the older ones while the younger ones draw, and \
then the other way round. She says that the little ones learn most by listening to what is not meant for them. \
When a child turns twelve it goes to the mainland during the week and comes home on Fridays. The parents stand \
on the quay and count the heads as the ferry comes in, as if one of them could have been lost on the way.

Water was always a difficulty. There is no river, and the wells give little in a dry summer. For a long time \
every house had a tank under the roof that collected the rain. Then engineers came and measured the ground, and \
they found that the rock under the eastern field holds water like a sponge. They drilled a hole of ninety \
metres, put in a pump, and laid pipes to every house. The pump runs on electricity from two wind turbines, \
because wind is the one thing that the island has never been short of. When both turbines stand still, which \
happens on perhaps five days in a year, the people go back to their tanks. They have kept them all. An old \
fisherman explained it to me: a machine is a good servant, he said, but a roof has never yet failed to get wet \
when it rained.

In spring the birds come back. They nest on the ledges of the cliffs, thousands of them, and the noise can be \
heard from the harbour. Scientists count them each year from a small boat. They divide the cliff into squares, \
count the birds in twenty of these squares, and multiply. The number has fallen by a third since they began, and \
nobody is sure why. Some think that the fish have moved north, where the water is colder. Others think that the \
storms in May have become stronger and wash the eggs from the lower ledges. To find out, they have put tiny \
instruments on the legs of forty birds. The instruments record where a bird flies and how deep it dives. When \
the birds return, the data can be read, and then, they hope, the question will be answered. If the fish have \
moved, the birds must be flying further than they used to.

My grandmother left the island when she was nineteen, because there was no work, and she came back when she was \
sixty, because she had done enough of it. In between she had been a cook, a clerk, a mother of four, and for \
eleven years the driver of a tram. She liked the tram best. You always know where you are going, she said, and \
yet every day somebody gets on whom you have never seen before. When she was very old I asked her whether she \
had ever been sorry, either about leaving or about coming back. She thought about it for a while. Then she said \
that both had been right at the time, and that it was a mistake to believe that only one of two things could be \
right.

I take the ferry three or four times a year now. I buy bread in the shop, I walk up to the white house, and I \
listen to the bell. It rang slowly this morning. The sun came out at about ten.
"""
